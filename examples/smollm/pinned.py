"""What is shared with examples/minilm: downloads, sentences, runs that can be stopped.

The other modules import it from here, since this one knows where that folder is.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "minilm"))
from sentences import Labelled, Package, cache, fetch, movie_reviews
from training import Stopped, checkpoints, claim, own, stop_requests, to_the_end

__all__ = [
    "Labelled",
    "Package",
    "Stopped",
    "cache",
    "checkpoints",
    "claim",
    "fetch",
    "movie_reviews",
    "own",
    "stop_requests",
    "to_the_end",
]
