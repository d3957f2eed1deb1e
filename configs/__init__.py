"""The configs that come with the package: `--config=NAME`, see each file."""
