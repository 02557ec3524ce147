"""gptchat: text and dialogues in, a chat model behind an HTTP API out. README.md lists the modules in reading order."""
