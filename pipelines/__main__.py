"""``python -m pipelines``: the ``gru`` command."""

from pipelines.cli import main

if __name__ == "__main__":
    main()
