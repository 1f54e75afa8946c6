"""Named like a module of the standard library, as users' files are; importing it by mistake is an error."""

if __name__ != "__main__":
    raise ImportError("a user's queue.py was imported instead of the standard library's")
print("I am the user's queue")
