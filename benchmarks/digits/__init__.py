"""N:M sparse training of a vision transformer on digits: one run, and the tables of all."""
