/* Prints the addresses of a name, IPv4 and IPv6, as the C library finds them. */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>

int main(int argc, char **argv)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *all;
	int error = argc == 2 ? getaddrinfo(argv[1], NULL, &hints, &all) : EAI_NONAME;
	char text[64];

	if (error) {
		fprintf(stderr, "%s\n", gai_strerror(error));
		return 1;
	}
	for (struct addrinfo *one = all; one; one = one->ai_next)
		if (!getnameinfo(one->ai_addr, one->ai_addrlen, text, sizeof(text), NULL, 0,
				 NI_NUMERICHOST))
			puts(text);
	return 0;
}
