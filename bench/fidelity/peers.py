"""placeholder"""
class Absent(RuntimeError):
    pass
def peers():
    return []
