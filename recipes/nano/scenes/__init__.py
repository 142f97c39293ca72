"""Plans of pictures and of the conversations about them."""
