"""What is done to this repository, rather than by the product."""
