"""The networks, and what they cost and where their arrays lie."""
