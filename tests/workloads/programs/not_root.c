/* What PostgreSQL is told of who it is, where only root's processes can be moved: it refuses to run as root. */
#include <sys/types.h>

uid_t getuid(void) { return USER_ID; }
uid_t geteuid(void) { return USER_ID; }
