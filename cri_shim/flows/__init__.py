"""One use case per file. A flow owns the order of the steps and their undo."""
