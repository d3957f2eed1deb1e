"""Videos without end for who looks at them: the live page and its server."""
