"""What is known of configurations: the user's files, the shipped tables, and looking a problem up in both."""
