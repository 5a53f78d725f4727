"""Unit files, their readers, and what turns them into batches."""
