"""The embedded world: ray-cast scenes on a table with exact truth, and texts written from it."""
