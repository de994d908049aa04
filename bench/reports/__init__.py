"""What a result looks like to a person: Markdown, a page with plots, plots alone.

``content`` says what is told, once for all forms; ``charts`` draws; ``markdown`` and ``page`` put it
into text. Nothing here measures.
"""
