"""Plans of images and of the conversations about them."""
