"""What scripts/chat.py talks by, in the terminal and on a page.

conversation.py: questions, pictures and answers of one chat, with stock transformers
models.py: the model folders and adapters that can be chosen, also while a run writes them
pictures.py: uploaded pictures, checked, and as the model sees them
server.py: the page's requests
page/: the page itself, which fetches nothing from elsewhere
"""
