"""Shipped studies, one YAML file each: ``gru search -c NAME`` finds them from any folder."""
