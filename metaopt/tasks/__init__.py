"""Task families, one file each: distributions over episodes of support and query."""
