"""Apply the package's methods in a run, as the recipe asks."""
