"""Keys and values kept as integers, one scale a token and head (`op.py`)."""
