"""``python -m silo``, for ``accelerate launch -m silo`` and for places where the script is not on the path."""

from silo.cli import main

main()
