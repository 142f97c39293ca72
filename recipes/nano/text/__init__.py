"""Questions, answers, definitions and long texts, and the tokenizer that spells them."""
