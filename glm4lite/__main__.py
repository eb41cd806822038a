"""`python -m glm4lite` is the `glm4lite` command."""

from glm4lite.cli.app import main

main()
