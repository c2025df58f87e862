"""A real model: 64 chats over 16 specs by Steer on both engines, by what it stands on, by peers."""
