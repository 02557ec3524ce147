"""Speed of gptchat beside the alternatives; `gptchat bench` runs it. Results: RESULTS.md here."""
