"""A reward function: it sees the whole batch, and any dataset column that its signature names."""


def polite(prompts, completions, **columns):
    """The share of polite words that the completion uses, between 0 and 1."""
    words = ("please", "thank", "welcome", "sorry", "glad")
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(word in text.lower() for word in words) / len(words) for text in texts]
