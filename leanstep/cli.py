def main():
    """Run the command line."""
