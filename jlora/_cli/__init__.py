"""The command line: inspect, convert, merge, combine, diff, match and check.

`main` is the parser and what every command shares: errors as one sentence, exit codes,
progress.  `adapters` reads and writes an adapter of any format; `commands` has a
function for each command.  **A new command** is a function there, and its arguments in
`main`.
"""
