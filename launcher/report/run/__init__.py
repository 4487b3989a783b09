"""The report of one run: answers, speed, load, requests, memory and cost."""
