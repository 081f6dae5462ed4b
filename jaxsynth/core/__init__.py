"""What every room needs: configs, console, errors, files."""
