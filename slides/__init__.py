"""Pixels and tables: slides, grids, tissue, cohorts, tiles. Knows nothing of models."""
