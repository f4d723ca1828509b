"""Values that are shown as a text: tables, in a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

V = TypeVar("V", covariant=True)


class Printed:
    """A value whose repr is its text, which may have several lines.

    A notebook shows the repr in a font of one width.  If the user has treescope show
    values, it shows the same.  It is imported only when it asks.
    """

    def __repr__(self) -> str:
        return str(self)

    def __treescope_repr__(self, path: Any, subtree_renderer: Any) -> Any:
        """The text, which folds to the name of the class."""
        from treescope import rendering_parts as parts

        text = parts.fold_condition(
            expanded=parts.text(str(self)),
            collapsed=parts.text(f"<{type(self).__name__}>"),
        )
        return parts.build_custom_foldable_tree_node(
            contents=text, path=path, expand_state=parts.ExpandState.EXPANDED
        )


class PrintedByPath(Printed, Mapping[str, V]):
    """A mapping from path to value that is shown as a text.

    Attributes:
      found: path to value.
    """

    found: Mapping[str, V]

    def __getitem__(self, path: str) -> V:
        return self.found[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)
