"""What nano's pictures and words are made from: fonts, sprites, photographs, word lists."""
