"""Learning rates: those of AdamW carried over, and a search of short runs."""
