"""Answers a file of requests: reading its lines, keeping what is answered on the disk, writing the answers in order."""
