"""Speed of gptchat beside the alternatives; `gptchat bench` runs it. Results: README.md here."""
