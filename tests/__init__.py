"""Tests, in the rooms of what they test; helpers stand here."""
