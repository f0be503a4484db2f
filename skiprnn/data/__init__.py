"""The papers' data sets as sequences: one module each, and in `base` what they share."""
