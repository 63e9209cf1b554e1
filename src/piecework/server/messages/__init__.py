"""What models write in conversations: reasoning, calls of tools, and the families that write them alike."""
