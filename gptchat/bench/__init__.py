"""gptchat beside what you would use instead. `gptchat bench` runs it."""
