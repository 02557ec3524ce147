"""gptchat: train a tokenizer, pre-train a GPT-2, fine-tune it to chat, and serve both. The modules in reading order are in README.md."""
