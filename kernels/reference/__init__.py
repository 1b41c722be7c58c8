"""The definitions of the ops, in plain torch: for any dtype and device."""
