"""lm-eval (EleutherAI) as the harness: our tasks in its format, our models behind its interface."""
