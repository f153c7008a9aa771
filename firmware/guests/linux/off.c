/* The first process of a guest that does nothing but power off: what remains is the kernel's and the monitor's time. */
#include <sys/reboot.h>
#include <unistd.h>

int main(void)
{
    reboot(RB_POWER_OFF);
    pause();
}
