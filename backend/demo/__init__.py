"""The embedded tiny model: its weights, and the code that draws its world, trains and measures it."""
