"""The published evaluations of Ferret: ``python -m ferret_mlx.evaluate NAME ...``.

One file per benchmark says which items it has, what it asks about each and how an answer counts;
one runner asks them all. Scores are those of the released scripts on complete inputs.
"""
