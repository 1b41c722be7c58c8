"""The methods of the package in a recipe's run."""
