"""Published files in and out: layouts, names, formats, conversion."""
