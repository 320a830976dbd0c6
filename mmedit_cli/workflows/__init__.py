"""What each command does, behind the command line: resolve what is asked, run it, keep the run."""
