"""Sources of nano's images and words: fonts, emoji sprites, photographs, word lists."""
