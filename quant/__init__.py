"""Weight formats, recipes and importance matrices."""
