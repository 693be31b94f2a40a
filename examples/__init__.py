"""Small programs to copy from: ``python -m examples.chat`` and the like. docs/examples.md shows them."""
